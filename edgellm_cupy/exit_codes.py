"""How the command ends, and what `suite.exit_code` and `compare` say of a run; the command's help explains each."""

EXIT_DONE, EXIT_REGRESSION, EXIT_USAGE, EXIT_NO_GPU, EXIT_WRONG_RESULT, EXIT_UNSTABLE, EXIT_PARTIAL = range(7)
EXIT_INTERRUPTED, EXIT_TERMINATED = 130, 143  # 128 and the signal's number, as shells have it
