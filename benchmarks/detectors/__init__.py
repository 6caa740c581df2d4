"""Detectors in environments of their own, one script each, for `itd evaluate full-scale --detector command`."""
