#[hopline::service]
trait Demo {
    async fn put(&self, (a, b): (u8, u8));
    async fn set(&self, _: u8);
    async fn get(&self, mut value: u8) {}
}

fn main() {}
