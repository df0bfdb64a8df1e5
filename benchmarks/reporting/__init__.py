"""Tables, pictures and pages made of results: `vllm-sparq report`, and the tables of the documents."""
