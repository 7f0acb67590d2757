"""Smallstep's step-ca as an upstream CA."""
