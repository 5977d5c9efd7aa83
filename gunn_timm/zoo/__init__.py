"""What is known of published weights, the checks that files must pass, and publishing on the Hugging Face Hub."""
