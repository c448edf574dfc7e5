"""From results of lm-eval to scores, comparisons and pages."""
