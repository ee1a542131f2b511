"""For authors of problems, solvers and backends: contract checks, reference answers, and claims that can fail."""
