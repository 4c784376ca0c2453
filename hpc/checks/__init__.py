"""What `prothpc doctor` looks at: a module for each subject, each with its checks."""
