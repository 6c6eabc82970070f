"""One line on the state of the shop."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand
from django.db.models import F, Sum

from catalog.models import Customer, Order, OrderLine, Product


class Command(BaseCommand):
    help = "Say how many products, customers and orders there are, and what the orders are worth."

    def handle(self, **options: Any) -> None:
        counts = [
            (Product, "products"),
            (Customer, "customers"),
            (Order, "orders"),
            (OrderLine, "order lines"),
        ]
        state = [f"{model.objects.count():,} {name}" for model, name in counts]
        stock = Product.objects.aggregate(worth=Sum(F("price") * F("stock")))["worth"] or 0
        sold = OrderLine.objects.aggregate(worth=Sum(F("price") * F("quantity")))["worth"] or 0
        self.stdout.write(", ".join([*state, f"stock worth {stock:,.2f}", f"sold {sold:,.2f}"]))
