"""How long tests wait for something that has to come, and whose failure would be a hang."""

PATIENCE_S = 900.0
"""Far beyond what anything here takes. Four policy processes start in 26 s on two idle cores, but
in over 120 s where others compute; they become another policy in 1 s, or in 50."""
