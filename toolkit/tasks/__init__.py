"""What is learned: where the rows come from, what the prompt is, which tokens carry the loss, and how text is scored."""
