"""A page where methods and budgets answer the same question side by side, made with Gradio."""
