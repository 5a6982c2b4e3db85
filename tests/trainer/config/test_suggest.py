from prime_trainer.config.suggest import did_you_mean


def test_close_names_in_order_of_likeness():
    known = ["chain_sum", "chain_product", "countdown"]
    assert did_you_mean("chain_sun", known) == "; did you mean chain_sum?"
    assert did_you_mean("chain_sun", known, most=2, show=repr) == "; did you mean 'chain_sum' or 'chain_product'?"
    assert did_you_mean("zebra", known) == ""
