"""What shows or logs a run while it goes on.

Progress on the terminal and in notebooks, TensorBoard events and plots are plugins like any other, and follow every run.
Weights & Biases, MLflow and trackio are parts of a recipe (`run.loggers`): subclasses of `bilevel.logger.Logger`.
"""
