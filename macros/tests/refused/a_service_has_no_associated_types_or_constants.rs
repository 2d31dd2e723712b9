#[hopline::service]
trait Demo {
    type Key;
    const LIMIT: usize;
    async fn put(&self);
}

fn main() {}
