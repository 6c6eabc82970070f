"""Fill the shop: the same data for the same number of rows."""

from __future__ import annotations

import itertools
import random
import uuid
from argparse import ArgumentParser
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

from django.contrib.auth.models import User
from django.core.management.base import BaseCommand, CommandError
from django.db import transaction
from django.utils.text import slugify

from catalog.models import Category, Customer, Order, OrderLine, Product

CATEGORIES = {
    "Kitchen": {"Knives": "Knife", "Pans": "Pan", "Mugs": "Mug", "Bowls": "Bowl"},
    "Garden": {"Spades": "Spade", "Pots": "Pot", "Hoses": "Hose", "Benches": "Bench"},
    "Office": {"Lamps": "Lamp", "Desks": "Desk", "Chairs": "Chair", "Pens": "Pen"},
    "Travel": {"Bags": "Bag", "Tents": "Tent", "Maps": "Map", "Bottles": "Bottle"},
}
MATERIALS = ["Oak", "Steel", "Linen", "Copper", "Glass", "Wool", "Cork", "Slate"]
STYLES = ["Plain", "Folding", "Little", "Grand", "Sturdy", "Light", "Classic", "Northern"]
FIRST_NAMES = [
    "Ada",
    "Bruno",
    "Chloé",
    "Dmitri",
    "Esra",
    "Femi",
    "Grace",
    "Hélène",
    "Ivo",
    "Jun",
    "Karin",
    "Luis",
]
LAST_NAMES = [
    "Andersson",
    "Bianchi",
    "Costa",
    "Dubois",
    "Evans",
    "Fischer",
    "García",
    "Horváth",
    "Ito",
    "Jansen",
]
CITIES = ["Aarhus", "Bologna", "Cork", "Dresden", "Espoo", "Faro", "Ghent", "Haarlem", "Innsbruck", "Kraków"]
NOTES = [
    "",
    "",
    "",
    "Please ring twice.",
    "A gift: no invoice in the parcel, please.",
    "Leave it with the neighbour.",
]

OPENED = datetime(2024, 1, 1, tzinfo=timezone.utc)
DAYS = 700


class Command(BaseCommand):
    help = "Fill an empty shop with products, customers and orders."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--rows", type=int, default=40_000, help="About how many rows (default: 40000).")

    @transaction.atomic
    def handle(self, *, rows: int, **options: Any) -> None:
        if Category.objects.exists():
            raise CommandError("This shop has data already.")
        chance = random.Random(rows)
        User.objects.create_superuser("admin", "admin@example.com", "admin")
        products = self.products(chance, rows // 40)
        customers = self.customers(chance, rows // 8)
        self.orders(chance, rows // 4, products, customers)

    def products(self, chance: random.Random, count: int) -> list[Product]:
        kinds = []
        for name, children in CATEGORIES.items():
            parent = Category.objects.create(name=name, slug=slugify(name))
            for child, noun in children.items():
                kinds.append((Category.objects.create(name=child, slug=slugify(child), parent=parent), noun))
        return Product.objects.bulk_create(
            Product(
                category=category,
                sku=f"{noun[:2].upper()}-{number:05}",
                name=f"{chance.choice(STYLES)} {chance.choice(MATERIALS)} {noun}",
                price=Decimal(chance.randint(300, 30_000)) / 100,
                stock=chance.randint(0, 400),
                attributes={
                    "weight_g": chance.randint(20, 9_000),
                    "colours": chance.sample(["red", "oak", "grey"], 2),
                },
            )
            for number, (category, noun) in zip(range(count), itertools.cycle(kinds))
        )

    def customers(self, chance: random.Random, count: int) -> list[Customer]:
        names = [(chance.choice(FIRST_NAMES), chance.choice(LAST_NAMES)) for _ in range(count)]
        return Customer.objects.bulk_create(
            (
                Customer(
                    name=f"{first} {last}",
                    email=f"{slugify(first)}.{slugify(last)}{number}@mail.test",
                    city=chance.choice(CITIES),
                    joined=self.moment(chance),
                )
                for number, (first, last) in enumerate(names)
            ),
            batch_size=5_000,
        )

    def orders(self, chance: random.Random, count: int, products: list[Product], customers: list[Customer]) -> None:
        orders = Order.objects.bulk_create(
            (
                Order(
                    customer=chance.choice(customers),
                    reference=uuid.UUID(int=chance.getrandbits(128), version=4),
                    status=chance.choice(Order.Status.values),
                    placed=self.moment(chance),
                    note=chance.choice(NOTES),
                )
                for _ in range(count)
            ),
            batch_size=5_000,
        )
        OrderLine.objects.bulk_create(
            (
                OrderLine(order=order, product=product, quantity=chance.randint(1, 4), price=product.price)
                for order in orders
                for product in chance.sample(products, min(len(products), chance.randint(1, 4)))
            ),
            batch_size=5_000,
        )

    def moment(self, chance: random.Random) -> datetime:
        return OPENED + timedelta(days=DAYS * chance.random())
