"""The version of every package here."""

VERSION = "0.2.0"
