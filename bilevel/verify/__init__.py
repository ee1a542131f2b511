"""Measure whether solvers behave as the theory says: claims, fitted rates, and what came out."""
