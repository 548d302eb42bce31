"""Pages of HTML that stand on their own: what `quantcore compare --html` and `quantcore inspect --html` write."""
