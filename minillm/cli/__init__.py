"""The command line: one small file per command.  Only here does minillm print."""
