#[hopline::service]
trait Demo {
    async fn put(&self)
    where
        Self: Send;
}

fn main() {}
