"""What a slow rank is, and under which tags metrics have the slowest one of each interval. No torch here."""

RANK_TAG = "speed/slowest_rank"
SECONDS_TAG = "speed/slowest_rank_seconds"
FACTOR_TAG = "speed/slowest_rank_factor"
# A rank is slow that works so many times as long as the others' median, in so many intervals in a row.
SLOW, INTERVALS = 1.5, 3
