#[derive(Debug, serde::Deserialize)]
pub struct Item(u64);

#[hopline::service]
trait Store {
    async fn put(&self, id: u64, item: Item);
}

fn main() {}
