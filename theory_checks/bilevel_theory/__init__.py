"""What the theory says about these solvers, one claim a file, each measured on the code that users run."""
