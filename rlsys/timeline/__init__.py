"""Where the time of a run goes: what each actor did when, what limited a step, what to change."""
