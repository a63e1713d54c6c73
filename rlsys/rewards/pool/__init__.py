"""The processes that score: jobs, worker pools, what a failure costs."""
