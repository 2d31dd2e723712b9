#[hopline::service]
trait Demo
where
    Self: Send,
{
    async fn put(&self);
}

fn main() {}
