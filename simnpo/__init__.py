"""SimNPO and NPO unlearning with a loss that never materialises the logits."""
