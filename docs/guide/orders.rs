// The running example of the guide: what a shop's clients and servers share, and one implementation. The chapters take
// it in by a hidden line, and show the parts that they talk about.

use std::collections::BTreeMap;
use std::sync::Mutex;

use hopline::Context;
use serde::{Deserialize, Serialize};

/// What a customer has ordered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Order {
    pub id: u64,
    pub item: String,
    pub quantity: u32,
}

/// Why an order was not taken.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, thiserror::Error)]
pub enum OrderError {
    #[error("only {left} left")]
    SoldOut { left: u32 },
    #[error("there is no such item")]
    UnknownItem,
}

#[hopline::service]
pub trait Orders {
    /// Takes an order.
    async fn place(&self, item: String, quantity: u32) -> Result<Order, OrderError>;
    /// Finds an order by its number.
    #[rpc(idempotent, timeout = "2s")]
    async fn find(&self, id: u64) -> Option<Order>;
    /// Which instance of the service answers.
    #[rpc(idempotent)]
    async fn whoami(&self, ctx: &Context) -> String;
    /// Mails the receipt, some time later.
    #[rpc(oneway)]
    async fn send_receipt(&self, id: u64, email: String) -> Result<(), String>;
}

/// Sells from a stock in memory.
pub struct Shop {
    books: Mutex<Books>,
}

struct Books {
    stock: BTreeMap<String, u32>,
    orders: Vec<Order>,
}

impl Shop {
    pub fn new() -> Self {
        let stock = BTreeMap::from([("tea".to_owned(), 10), ("coffee".to_owned(), 3)]);
        Self { books: Mutex::new(Books { stock, orders: Vec::new() }) }
    }
}

impl Orders for Shop {
    async fn place(&self, item: String, quantity: u32) -> Result<Order, OrderError> {
        let mut books = self.books.lock().expect("no panic while holding the books");
        let left = books.stock.get_mut(&item).ok_or(OrderError::UnknownItem)?;
        *left = left.checked_sub(quantity).ok_or(OrderError::SoldOut { left: *left })?;
        let order = Order { id: books.orders.len() as u64 + 1, item, quantity };
        books.orders.push(order.clone());
        Ok(order)
    }

    async fn find(&self, id: u64) -> Option<Order> {
        let books = self.books.lock().expect("no panic while holding the books");
        books.orders.iter().find(|order| order.id == id).cloned()
    }

    async fn whoami(&self, ctx: &Context) -> String {
        ctx.instance().to_owned()
    }

    async fn send_receipt(&self, id: u64, email: String) -> Result<(), String> {
        println!("a receipt for order {id} goes to {email}");
        Ok(())
    }
}
