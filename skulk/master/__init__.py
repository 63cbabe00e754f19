"""The master role: elected, the only writer of the log; turns place requests into assignment events."""
