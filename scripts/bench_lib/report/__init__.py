"""Figures and the pages made of them."""
