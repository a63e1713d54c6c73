from hypothesis import settings

# Nothing here is judged by how long it took: a busy machine would fail tests at random.
settings.register_profile("rlsys", deadline=None)
settings.load_profile("rlsys")
