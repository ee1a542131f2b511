from bilevel.suggest import did_you_mean, nearest


def test_a_misspelled_name_gets_the_nearest_known_one() -> None:
    assert did_you_mean("scaleboi", ["f2sa", "scalebio"]) == "; did you mean 'scalebio'?"


def test_a_name_like_no_other_gets_all_known_ones() -> None:
    assert did_you_mean("zzz", ["f2sa", "scalebio"]) == "; known: f2sa, scalebio"
    assert nearest("zzz", ["f2sa", "scalebio"]) is None
