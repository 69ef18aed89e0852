"""What any training program needs and no reader of the method wants to see first: the command line,
processes, checkpoints, data, grading of answers, metrics, errors, memory, models and reports."""
