"""Measurements that the README and the tables quote."""
