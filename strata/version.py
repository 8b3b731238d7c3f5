"""The version of every package here."""

VERSION = "0.1.0"
