"""Rate-distortion rounding against dense formulas and plain rounding."""
