"""For authors of problems, solvers and backends: contract checks, reference answers, and a solver at work step by step."""
