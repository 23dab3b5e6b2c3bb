"""Code that commands share: data, nets, recipes, training, attacks, records, tables, figures."""
