"""Experiments on shortcuts: does IFM keep the features that InfoNCE suppresses?"""
