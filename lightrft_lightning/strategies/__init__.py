"""Strategies: back ends behind one interface."""
