"""`pgolf data`: checks a data set as a judge would, and makes one with case operators."""
