"""A package whose pass has the name of another package's."""

from acme.name_outliers import NameOutliers  # noqa: F401
