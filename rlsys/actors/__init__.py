"""Ray, and all of Ray: the actors of each role, where they run, and how they are waited for."""
