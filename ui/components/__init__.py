"""The player: our one custom component, plain HTML, CSS and JavaScript without any build step."""
