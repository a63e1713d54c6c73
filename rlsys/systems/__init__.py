"""The running roles of further methods of training, beside those in rlsys/system.py."""
