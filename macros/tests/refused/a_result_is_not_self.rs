#[hopline::service]
trait Demo {
    async fn put(&self) -> Self;
}

fn main() {}
