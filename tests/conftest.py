import os

from hypothesis import settings

# Nothing here is judged by how long it took: a busy machine would fail tests at random.
settings.register_profile("rlsys", deadline=None)
settings.load_profile("rlsys")
# The same for Ray's own start, in this process and in those that tests start.
os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")
