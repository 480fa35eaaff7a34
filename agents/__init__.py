"""Stages of the money movements: one file per arrow of the flow, and the machinery they share."""
