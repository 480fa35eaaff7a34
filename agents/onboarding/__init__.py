"""Onboarding: an approved customer gets wallets."""
