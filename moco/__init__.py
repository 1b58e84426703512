"""Momentum contrast (MoCo v1 and v2) with implicit feature modification (IFM)."""
