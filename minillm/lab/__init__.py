"""Measurements on a user's own model and text.  Built on the library, used by the command line; prints nothing."""
