"""The models that data learns from: one answers, one scores passages."""
