"""The scorecard: a picture model judged offline by rules, recognition, likeness and memory, beside its controls."""
